"""Recordings: episodes, the shard format on disk, and the collector."""
