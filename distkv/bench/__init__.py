"""Measurements that a user can repeat; each prints its ceiling or its peer beside it."""
