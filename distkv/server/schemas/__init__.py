"""The bodies of requests. What the server does not know, or cannot do, is refused."""
