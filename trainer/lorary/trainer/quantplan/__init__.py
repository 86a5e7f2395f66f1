"""Plan which layers of a base stay whole when the others are quantized, from what each one's rounding costs."""
