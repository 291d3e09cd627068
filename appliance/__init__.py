"""A self-hosted appliance that serves open-weight models and decides, per request, where it is answered."""

__version__ = "0.1.0"
