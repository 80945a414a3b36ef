"""Recipes and schedules for tests of plans."""

from mgvideo.plan.coarse_to_fine import cooldown, monotone, random
from mgvideo.plan.plan import Base
from mgvideo.plan.schedules import baseline, long, multigrid, short

KINETICS = Base(64, 32, 224, 2, (256, 320), 239, 0.1, (94, 154, 196), 0.1, 34, 0.01)
CHARADES = Base(16, 64, 224, 2, (256, 340), 57, 0.0375, (41, 49), 0.1, 4, 1e-4)
SSV2 = Base(16, 64, 224, 2, (256, 320), 22, 0.03, (14, 18), 0.1, 0.19, 1e-4)
SMALL = Base(16, 16, 64, 2, (64, 84), 10, 0.1, (4, 8), 0.1, 0.5, 0.01)
SCHEDULES = (baseline, short, long, multigrid)
ALL_SCHEDULES = (*SCHEDULES, monotone, cooldown, random)
KINETICS_CLIPS = 240_000
