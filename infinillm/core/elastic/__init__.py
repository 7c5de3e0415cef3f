"""LoongServe's global scheduler as pure functions: who prefills, who decodes, on how many instances."""
