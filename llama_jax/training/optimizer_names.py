"""List the implemented values of `--optim`. Jax is not imported, so that the flags can read the table."""

OPTIMIZERS = {
    "adamw_torch": "AdamW with decoupled weight decay",
    "adamw_8bit": "AdamW with moments in 8 bits, as bitsandbytes' AdamW8bit",
    "sgd": "gradient descent without momentum",
    "adafactor": "Adafactor with the Trainer's settings: no relative step, no scaling by the parameter",
    "lion_32bit": "Lion with decoupled weight decay",
}
WITHOUT_MOMENTS = ("sgd", "adafactor")  # at most 0.01 bytes a parameter: nothing to keep elsewhere
