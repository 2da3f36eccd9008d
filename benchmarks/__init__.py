"""Head-to-head measurements of the algorithms, and their reports."""
