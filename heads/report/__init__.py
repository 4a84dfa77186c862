"""A run as one page of HTML that needs nothing else: how good it is, where it errs, on what."""
