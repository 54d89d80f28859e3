"""Post-training quantization of a VILA to 4-bit weights, from calibration activations.

config                   what to quantize and how
calibration_data         the calibration set: prompts with images, or plain text
activations              runs it through a decoder layer and captures the inputs of each linear
hessian                  H = E[x xᵀ] of these inputs, its damping and its factors; error correction (QEP)
awq_scales               channel scales per scale group (AWQ, Lin et al. 2023)
quant_grid               scales and zero points per group, clipping search
gptq                     quantizes column by column with error compensation (GPTQ, Frantar et al. 2022)
awq_gptq                 quantizes one decoder layer with all of these
vision                   the same for the vision tower and the projector, without channel scales
llm_awq, awq_cache_file  llm-awq's own objective, and its cache files
pipeline, resumable      a whole checkpoint layer by layer, and its work folder
report                   quantization.json and its plot
"""
