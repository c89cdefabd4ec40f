#pragma once
#include "../cublas.h"
