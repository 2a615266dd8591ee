"""One layer of the dispatch objective."""
