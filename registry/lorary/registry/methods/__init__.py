"""Other methods than LoRA, turned into LoRA where that is exact.

A linear layer changed by VeRA, MiSS or LoHa is changed by a product of two thin matrices, so a LoRA with
these matrices computes the same, on every server. What is not such a product is refused with the reason.
"""
