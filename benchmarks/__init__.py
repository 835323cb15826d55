"""Measurements that need minutes: latency, engine times beside a peer, exactness of many plans."""
