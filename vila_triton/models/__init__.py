"""The model, as frozen trees of parameters and pure functions over them."""
