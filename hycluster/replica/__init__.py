"""Around one engine: a Ray Serve replica, its ranks, its sockets, its health."""
