"""Many replicas of one server on Ray Serve: ``serve run lorary.server.on_ray.application:build base=…``.

What goes where::

    client ── gRPC ──> proxy (ingress) ── Serve, by adapter ──> replica (core.Core, as in lorary serve)

``ingress`` runs in Serve's proxies, ``replica`` in its replicas; ``refusal`` is what the two agree on.
Ray Serve 2.60 is needed: pip install 'lorary[ray]'. docs/scaling.md says when all this is worth it.
"""
