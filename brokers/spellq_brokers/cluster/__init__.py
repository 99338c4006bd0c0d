"""The adapters of a cluster: Redis keeps the present, RabbitMQ carries events and tickets."""

from spellq_brokers.cluster.bus import RabbitBus
from spellq_brokers.cluster.store import RedisStore

__all__ = ["RabbitBus", "RedisStore"]
