"""The operations that run a quantized model, each with a torch reference that is its meaning.

`matmul`: grid_matmul, a product with a coded weight, and the list of its implementations (products), one of which is
chosen for each layer when a model is loaded. `embedding`: embed, the look-up of coded rows. `attention`: kv_attention
over packed keys and values.
"""
