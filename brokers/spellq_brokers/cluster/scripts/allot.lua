-- New numbers for a command, or those it was given before.
--
--   KEYS[2]  numbers   hash    the last number of each kind
--   KEYS[3]  allotted  string  the first number the command was given; goes after a day
--   ARGV     2 kind  3 count  4 seconds to remember it
-- Returns the first of them.
local first = redis.call('GET', KEYS[3])
if not first then
  first = redis.call('HINCRBY', KEYS[2], ARGV[2], ARGV[3]) - ARGV[3] + 1
  redis.call('SET', KEYS[3], first, 'EX', ARGV[4])
end
return tonumber(first)
