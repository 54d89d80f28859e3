"""The bundled model: a tiny VILA that is trained to answer questions about synthetic images.

scenes, questions   random scenes of shapes, images of them, questions with exactly one right answer
tokenizer           a word-level tokenizer for these questions
config              the geometry of the model and its checkpoint folder
training_data       packed rows and batches
train               trains it: `python -m vila_triton.tiny.train`
evaluate            grades it: `python -m vila_triton.tiny.evaluate`
finetune            teaches it a new kind of question by LoRA: `python -m vila_triton.tiny.finetune`
examples            draws the example images
"""
