"""Measurements that need minutes: latency suites, engine times beside a peer, exactness of many random plans."""
