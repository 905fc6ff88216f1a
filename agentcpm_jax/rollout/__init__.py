"""Episodes and groups of them, within a bound of staleness."""
