"""What can be found out about a machine before anything is loaded: what both doctors look at.

Each check says what was seen, what is the limit, and how to mend it. No torch, no model.
"""
