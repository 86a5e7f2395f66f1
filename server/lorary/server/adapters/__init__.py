"""Adapters on the device: the pool that holds them, the layers that apply them, who may stay."""
