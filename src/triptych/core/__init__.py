"""Framework-free core: the single source of every number. Knows no framework (tests/walls)."""
