"Foresee congestion and failures in a fab's material handling."

__version__ = "0.1.0"
