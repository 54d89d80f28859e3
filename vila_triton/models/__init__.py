"""The model as pure functions over frozen trees of parameters: LLaMA, the vision towers, the projector and VILA.

config, vision_config, config_fields   the geometry of each part, read strictly from config.json
params                                 parameter specs, trees of them, loading
layers                                 linear maps and norms
joined, side_by_side                   linear maps of one input as one, views of one storage
llama                                  the language model
vision, vision_*                       the vision towers (SigLIP, CLIP, InternViT), S2 scales
projector                              image features to the width of the language model
vila                                   the three together, and image tokens in a prompt

Axes: b images or sequences, s tokens or positions, e hidden size, f intermediate size, h query heads, g KV heads, d
head dim, v vocabulary, c channels, n and k outputs and inputs of a linear map.
"""
