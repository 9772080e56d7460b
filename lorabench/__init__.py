"""What did this fine-tuning change in the weights, and what did it cost?"""

from lorabench.api.analyze import analyze as analyze
from lorabench.api.load import load as load
from lorabench.api.plan import plan as plan
from lorabench.api.results import results as results
from lorabench.api.run import run as run
from lorabench.config.decode import InputError as InputError
