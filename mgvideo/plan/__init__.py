"""Plans of training runs: schedules, shards and cost. Pure arithmetic without torch."""
