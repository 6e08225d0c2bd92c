"""Stands before the package of this name in Ray's own processes: `jsonschema` then does without it.

JupyterLab brings that package, `import ray` reaches it through `jsonschema`, and it takes 3 s to build its grammar. Each
of Ray's ten processes would pay that, and Ray gives up if one of them is not up within 15 s.
"""

raise ImportError("not needed by Ray")
