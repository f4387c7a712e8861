"""Plain English words: keys are an adjective and a noun; function words are no common words."""

_ADJECTIVES = """
able ancient autumn awake azure bashful bitter blank bold brave breezy brief bright brisk broad
bronze calm candid careful cautious cheerful chilly civil clean clever cloudy clumsy coarse complex
cosmic crimson crisp curious curly daily dapper daring decent deep dense dim distant double dreamy
dry dusty eager early earnest eastern easy elastic elder elegant empty endless equal even exact
faint fair faithful famous fancy fertile fierce final fine firm fluent foggy fond foreign formal
fragile frank free fresh friendly frosty frozen full gentle giant gifted glad gloomy golden
graceful grand grateful greedy handy happy harsh hasty heavy helpful hidden hollow honest humble
hungry icy idle immense inland jolly joyful keen kind large late lavish lazy level light likely
lively lonely long loud loyal lucky major mellow merry mighty mild misty modern modest narrow
native neat nervous nimble noble noisy northern obvious odd open orderly outer pale patient
peaceful plain playful pleasant polite prompt proper proud quaint quick quiet rapid rare ready
remote rich robust rough round royal rugged rural rustic sacred salty scarce secret serene severe
shallow sharp shiny short shy silent silky silver simple sincere sleepy slender slim slow smooth
sober solemn solid southern spare spicy steady steep stern sticky strange strict sturdy subtle
sudden sunny swift tame tender thin thirsty tidy timid tiny tough tranquil upper urban useful vague
vast velvet vivid warm wealthy weary western whole wide wild wise witty wooden worthy young zealous
"""

_NOUNS = """
acorn actor album alley almond anchor ankle anvil apple apron arch armor arrow artist attic aunt
badge bakery balcony banana banjo barley barn barrel basin basket beacon beaver bench berry bicycle
bishop blanket blossom bottle boulder bracelet branch bread breakfast bridge broom brother bucket
buffalo builder bulb butcher butter button cabbage cabin cable cactus camel camera candle canoe
canyon captain caravan carpet carrot castle cathedral cattle cavern cellar chain chalk chapel
cheese cherry chest chicken chimney chisel circle citizen clerk cliff clock closet clover coach
cobbler coconut coffee collar comet compass copper coral corner cottage cotton cousin cradle crane
crater creek cricket crown crystal cupboard curtain cushion daisy dancer desert diamond dinner
doctor dolphin donkey dragon drawer dream drum eagle earring elbow elephant emerald engine evening
falcon farmer feather fence ferry fiddle field finger flannel flute forest fork fortress fountain
fox friend galaxy garden garlic gate geyser ginger giraffe glacier glove goat goose grape guitar
hammer hammock harbor harp harvest hatch hawk hazel helmet herring hill honey horizon horse hotel
hunter island ivory jacket jaguar jewel journey judge jug jungle kettle kingdom kitchen kite ladder
lagoon lake lamp lantern lawyer leather lemon leopard letter library lizard lobster locket lumber
magnet mango mansion maple marble market marsh meadow medal melon merchant mirror monkey moon
morning mountain museum mushroom mustard napkin needle nephew nickel notebook novel oasis oatmeal
ocean olive onion orange orchid otter oven owl oyster paddle painter palace panda panther paper
parrot pasture peach peanut pearl pebble pelican pencil penguin pepper piano picture pigeon pillow
pilot pine pistachio planet plaza plow plum pocket poem pond pony poppy porch potato prairie
pumpkin puzzle pyramid quail quarry quilt rabbit raccoon radish railway raven reef ribbon river
robin rocket roof rope ruby saddle sailor salmon sandal saucer scarf school scissors seal shadow
shelter shepherd shield shovel singer sister skillet sled slipper spider spinach spoon spring
squirrel stable staircase statue stove stream summer swan table tailor teacher teapot temple
thistle thread thunder ticket tiger timber tomato tortoise tower trumpet tulip tunnel turkey turnip
turtle uncle valley vase village vineyard violin volcano wagon walnut walrus warehouse water weaver
whale wheat wheel whistle willow window winter wizard wolf yacht zebra
"""

_VERBS = """
accept admire advise allow announce answer appear argue arrange arrive attend avoid balance behave
believe belong borrow bounce breathe bring bury carry celebrate change choose climb collect combine
compare complain connect consider continue cough cover create dance decide declare deliver depend
describe deserve develop discover divide doubt earn encourage enjoy enter escape examine expand
explain explore fasten fetch float follow forget forgive gather greet guess happen hesitate hope
hurry imagine improve include invite join juggle knit laugh learn listen march measure mention
multiply notice obey observe offer organize perform persuade plant polish practice prefer prepare
pretend promise protect provide punish push realize receive recognize reflect refuse rejoice remain
remember remind repair repeat reply rescue return reward sail scatter scratch search send settle
shiver sketch smile sneeze solve sprinkle squeeze stretch struggle suggest supply suppose surprise
swallow sweep swim thank travel tremble trust understand unite vanish visit wander warn whisper
wonder write yawn
"""

_FUNCTION_WORDS = """
about above after again against almost along already also although always among another anything
because been before being below beneath beside besides between beyond both cannot could does doing
done down during each either else even ever every everything from further half hardly have having
hence here hers herself himself however indeed into itself less like many might mine more moreover
most much must myself neither never nevertheless none nothing once only onto other others otherwise
ought ours ourselves over perhaps quite rather same seem seemed shall should since some somehow
something sometimes somewhat still such than that their theirs them themselves then thence there
therefore thereof these they this those though through throughout thus till together toward towards
under unless until upon very well were what whatever when whence whenever where whereas wherein
wherever whether which whichever while whom whose will with within without would your yours
yourself
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
VERBS = tuple(_VERBS.split())
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
