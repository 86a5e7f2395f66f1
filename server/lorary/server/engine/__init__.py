"""The engine: scheduler, batch, KV cache, runner, sampler, detokenizer, and the loop over them."""
