"""Images and videos, from files to features.

processing            files to pixel tensors, through transformers' image processors
preprocessor_config   strict reading of preprocessor_config.json
feature_cache         image features by the content of the image
"""
