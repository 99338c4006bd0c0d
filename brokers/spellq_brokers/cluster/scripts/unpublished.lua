-- What has been in the outbox for some time.
--
--   KEYS[2]  outbox    zset    steps to be published, by when they were committed (ms)
--   ARGV     2 for how long (ms)  3 how many at most
return redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms() - ARGV[2], 'LIMIT', 0, ARGV[3])
