"""Methods against data sets against seeds: who helps which tasks, and at what cost."""
