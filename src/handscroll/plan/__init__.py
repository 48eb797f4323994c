"""Pure arithmetic: decisions as functions of a spec, a request and the hardware. Loads no torch."""
