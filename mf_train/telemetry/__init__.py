"""How the tables of a model are read: counts of every row's reads, what they say, and when they are alarming."""
