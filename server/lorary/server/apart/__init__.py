"""The engine in a process of its own (``--engine-process``): base, adapters and steps there, everything else here.

The seam is ``server.ports``: the *door* (gRPC, HTTP, access, admission, registry, prompts, rollouts, metrics)
has ports whose other side is in the *engine's process*, which the door starts and ends.

=============  =================================================================================
``channel``    messages over a socket: JSON, a line each
``nouns``      what requests, outputs, leases and errors look like in them
``process``    the door's side: starts the other process, asks it, and notices when it is gone
``far``        the door's ports
``child``      the other process: a backend without doors
``build``      puts the door's backend together
=============  =================================================================================

A token costs no message of its own: what one step made of all its answers is one line. The socket is a pair that
only the two have; nothing that is read from it is ever executed.
"""
