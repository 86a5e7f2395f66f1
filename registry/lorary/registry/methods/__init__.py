"""Other methods than LoRA, turned into LoRA where that is exact.

A linear layer changed by VeRA, AdaLoRA, MiSS or LoHa is changed by a product of thin matrices, so a LoRA
of two of them computes the same, on every server. What is not such a product is refused with the reason.
"""
