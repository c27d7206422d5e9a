"""The experiments of `prism reproduce`, one claim each: what it computes, its tables, its figures and its verdict."""
