"""What names become outside: parameters in the safetensors files, and the model section's keys in config.json."""

# The wrapper holds the plain model as its attribute `model`: that prefix is all that a parameter's name gains.
PARAMETER_PREFIX = "model."

# Keys of ModelConfig that config.json calls otherwise: by what generic tools expect, or, for the hash's temperature,
# because transformers takes a `temperature` in config.json for a sampling setting. All other keys are the same.
CONFIG_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "sequence_length": "max_position_embeddings",
    "temperature": "hash_temperature",
}

# A key of config.json that ModelConfig does not have, only present where it is "int8": tables and LM head are int8 with
# float32 scales, and `dtype` is that of all other weights.
TABLE_DTYPE = "table_dtype"
INT8 = "int8"

# A key of config.json that is only present where it is true: the model was trained with `data.document_attention`, and
# `memoryformer evaluate` keeps the documents of a block apart as the trainer's validation does.
DOCUMENT_ATTENTION = "document_attention"
