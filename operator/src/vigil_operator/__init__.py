"""The operator. Pure: spec, status, crd, phases, observed, plan, render. Effects: the rest."""
