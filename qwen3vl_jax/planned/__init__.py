"""Joins the model and the planner: phases become programs, plans become a `Runner`.

The only place that knows both `memsched` and the model.
"""
