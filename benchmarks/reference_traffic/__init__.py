"""How much of weights and gradients travels in a step under ZeRO-3, by where the reference comes from."""
