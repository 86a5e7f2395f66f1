"""The OpenAI-compatible HTTP door: the same service, the same admission, another wire.

``listener`` embeds the HTTP server in the event loop; ``app`` says which path is what; ``call`` is one
request's life; ``body`` and ``requests`` read what was sent; ``generate`` runs it; ``answers`` and
``problems`` say what came out.
"""
