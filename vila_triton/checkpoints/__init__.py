"""Checkpoints on disk: reading, converting and writing folders of a VILA or a LLaVA-1.5.

loading              opens a folder, loads its parameters, saves a model
sources, llava       what a VILA folder or a LLaVA-1.5 holds
tensor_files, tensor_locations, torch_files   tensors by name from safetensors, .bin and .pt, memory-mapped
int4_packing, int4_layouts, int4_views        4-bit codes, the layouts of int4 linears, conversion as they are read
quantization_config  the config entries of int4 linears
writing, shard_writer, atomic_folder          a folder in any layout, restartable shard by shard
generation_config    how a model generates: limits, sampling, stop tokens
random_checkpoint    the models of configs/models/ with random weights
size_report          the bytes of a checkpoint
"""
