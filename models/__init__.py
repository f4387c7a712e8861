"""Language models as pure functions of their parameters, with the attention as an argument."""

from models.common.weights.errors import LoadError as LoadError
from models.common.weights.orbax import save_checkpoint as save_checkpoint
from models.common.weights.sharding import shard_params as shard_params
from models.load import abstract_model as abstract_model
from models.load import load_model as load_model
from models.model import Model as Model
