"""A Hub of one's own: the Hugging Face Hub's HTTP API over a folder, for networks without the Hub.

``hf download``, ``hf upload``, transformers, PEFT and Lorary's ``hf://`` registries work against it when
``HF_ENDPOINT`` names it. ``registry serve DIR`` starts it.

What happens in an upload: the client asks how each file is to travel (``app.preupload``), sends the large
ones (``uploads``, or ``xet`` where the client has it), and then one commit that names them all
(``repos.commit``), which is all or nothing and refused with 412 when its parent is not the head.
"""
