"""The sizes, models and steps that are timed, the timer, and the rows that hold the results.

cases            sizes to time an op at, from configs/bench
timing           the time of a call, and the peak rates of the machine
rows             results as JSON lines
format           times and configs in tables
measured_points, goals_attention   rows against the goals of `bench.goals`
model_configs    the models of configs/models
runners          one model run by vila-triton and by Hugging Face
vllm_runner, vllm_engine   the same by vLLM on a CPU, in a process of its own
model_steps      the steps of a model that are timed
step_cost        bytes and FLOPs that a step takes at least
peak_memory      the peak memory of tensors on any device
load_once        loads a checkpoint in a process of its own
prompts          questions with images
smollm2          SmolLM2-135M and English text
suite_plan       the steps of `bench.suite`
"""
