"""The model: transformers' own code over our weights, shards and paged attention."""
