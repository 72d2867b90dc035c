// What generated relational kernels are made of: rows of numbers spread over the lanes of a group, reductions within a
// group, and products of tiles in shared memory. A group is 1 to 32 lanes of a warp, or a block.

template <int G> __device__ __forceinline__ unsigned group_mask() {
    if constexpr (G >= 32) return 0xffffffffu;
    else return ((1u << G) - 1u) << (threadIdx.x % 32 / G * G);
}

template <int G> __device__ __forceinline__ void sync_group(unsigned mask) {
    if constexpr (G > 32) __syncthreads();
    else if constexpr (G > 1) __syncwarp(mask);
}

// ---- reductions; all lanes get the result, in an order that never changes

struct Plus {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Most {  // not fmaxf, which drops NaN
    static __device__ __forceinline__ float of(float a, float b) { return a > b || a != a ? a : b; }
};
struct Least {
    static __device__ __forceinline__ float of(float a, float b) { return a < b || a != a ? a : b; }
};

template <class Op, int G> __device__ __forceinline__ float join(float value, unsigned mask) {
    constexpr int LANES = G < 32 ? G : 32;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        value = Op::of(value, __shfl_xor_sync(mask, value, offset));
    if constexpr (G > 32) {
        __shared__ float parts[G / 32];
        __syncthreads();
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
        __syncthreads();
        value = parts[0];
#pragma unroll
        for (int w = 1; w < G / 32; ++w) value = Op::of(value, parts[w]);
    }
    return value;
}

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

__device__ __forceinline__ float leaky_relu(float x, float slope) { return x > 0.0f ? x : x * slope; }

// Where a row is among `count` ascending ones, of which it is one.
__device__ __forceinline__ int find_row(const int* listed, int count, int row) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (listed[middle] < row) low = middle + 1;
        else high = middle;
    }
    return low;
}

// An element of a small array in registers.
template <int N> __device__ __forceinline__ float pick(const float (&values)[N], int index) {
    float found = values[0];
#pragma unroll
    for (int c = 1; c < N; ++c) found = index == c ? values[c] : found;
    return found;
}

template <int N> __device__ __forceinline__ void add_to(float (&values)[N], int index, float more) {
#pragma unroll
    for (int c = 0; c < N; ++c) values[c] += index == c ? more : 0.0f;
}

// ---- numbers of a row

template <int V> struct Vector;
template <> struct Vector<1> { using type = float; };
template <> struct Vector<2> { using type = float2; };
template <> struct Vector<4> { using type = float4; };

template <int V> __device__ __forceinline__ void add_atomic(float* at, const float* more) {
#if __CUDA_ARCH__ >= 900
    if constexpr (V == 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(more[0]), "f"(more[1]),
                     "f"(more[2]), "f"(more[3]) : "memory");
        return;
    } else if constexpr (V == 2) {
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(more[0]), "f"(more[1]) : "memory");
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < V; ++j) atomicAdd(at + j, more[j]);
}

// SIZE numbers over G lanes, in vectors of V: a lane has COUNT of them in registers, `index` says which.
template <int G, int V, int SIZE> struct Spread {
    static constexpr int COUNT = (SIZE + G * V - 1) / (G * V) * V;
    static constexpr bool WHOLE = SIZE % (G * V) == 0;
    using Type = typename Vector<V>::type;

    static __device__ __forceinline__ int index(int at, int lane) { return (at / V * G + lane) * V + at % V; }
    static __device__ __forceinline__ bool has(int at, int lane) { return WHOLE || index(at, lane) < SIZE; }

    template <bool CONSTANT> static __device__ __forceinline__ void load(float (&to)[COUNT], const float* from, int lane) {
#pragma unroll
        for (int at = 0; at < COUNT; at += V) {
            union { Type vector; float numbers[V]; } u;
            if (!has(at, lane)) {
#pragma unroll
                for (int j = 0; j < V; ++j) to[at + j] = 0.0f;
                continue;
            }
            const Type* place = reinterpret_cast<const Type*>(from + index(at, lane));
            u.vector = CONSTANT ? __ldg(place) : *place;
#pragma unroll
            for (int j = 0; j < V; ++j) to[at + j] = u.numbers[j];
        }
    }
    static __device__ __forceinline__ void store(float* to, const float (&from)[COUNT], int lane) {
#pragma unroll
        for (int at = 0; at < COUNT; at += V) {
            if (!has(at, lane)) continue;
            union { Type vector; float numbers[V]; } u;
#pragma unroll
            for (int j = 0; j < V; ++j) u.numbers[j] = from[at + j];
            *reinterpret_cast<Type*>(to + index(at, lane)) = u.vector;
        }
    }
    static __device__ __forceinline__ void add(float* to, const float (&from)[COUNT], int lane) {
#pragma unroll
        for (int at = 0; at < COUNT; at += V)
            if (has(at, lane)) add_atomic<V>(to + index(at, lane), from + at);
    }
    static __device__ __forceinline__ void increase(float* to, const float (&from)[COUNT], int lane) {
#pragma unroll
        for (int at = 0; at < COUNT; ++at)
            if (has(at, lane)) to[index(at, lane)] += from[at];
    }
    // Numbers first ... first + WIDTH - 1, into a row of a tile.
    template <int WIDTH> static __device__ __forceinline__ void part(float* to, const float (&from)[COUNT], int lane, int first) {
        if constexpr (WIDTH == SIZE) {
            store(to, from, lane);
        } else {
#pragma unroll
            for (int at = 0; at < COUNT; ++at) {
                const int place = index(at, lane) - first;
                if (has(at, lane) && place >= 0 && place < WIDTH) to[place] = from[at];
            }
        }
    }
};

// Asks for SIZE numbers to be in the second cache when they are read.
template <int SIZE> __device__ __forceinline__ void prefetch(const float* from) {
#pragma unroll
    for (int at = 0; at < SIZE; at += 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// What a lane has of a row: numbers `at`, which are number i of it.
#define EACH(SPREAD) \
    _Pragma("unroll") for (int at = 0; at < SPREAD::COUNT; ++at) \
        if (const int i = SPREAD::index(at, lane); SPREAD::has(at, lane))

// ---- products

// A float32 as the sum of two numbers that tensor cores take (3xTF32: what is lost is 2^-21 of a product).
__device__ __forceinline__ void split(float value, unsigned& high, unsigned& low) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(value));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(value - __uint_as_float(high)));
}

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums[t] += x w for 16 rows and panels of 8 columns, of which this warp has every STEP-th, up to PANELS. x(row, k) is
// x[row * ROW + k * DEPTH_STEP]; w(k, column) is w[k * WS + column], from the warp's first panel on. A lane has rows
// lane / 4 and lane / 4 + 8, columns lane % 4 * 2 and the next. Numbers of x from `valid` on count as zeros.
template <int K, int NT, int STEP, int ROW, int DEPTH_STEP, int WS>
__device__ __forceinline__ void multiply(float (&sums)[NT][4], const float* x, const float* w, int panels, int valid) {
    const int lane = threadIdx.x % 32, group = lane / 4, slot = lane % 4;
#if __CUDA_ARCH__ >= 800
#pragma unroll
    for (int k = 0; k < K; k += 8) {
        unsigned high[4], low[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int row = group + q % 2 * 8, at = k + slot + q / 2 * 4;
            split(at < valid ? x[row * ROW + at * DEPTH_STEP] : 0.0f, high[q], low[q]);
        }
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            if (t * STEP >= panels) continue;
            unsigned b_high[2], b_low[2];
#pragma unroll
            for (int q = 0; q < 2; ++q) split(w[(k + slot + 4 * q) * WS + t * STEP * 8 + group], b_high[q], b_low[q]);
            mma(sums[t], low, b_high);
            mma(sums[t], high, b_low);
            mma(sums[t], high, b_high);
        }
    }
#else
#pragma unroll 4
    for (int k = 0; k < K; ++k) {
        const float first = k < valid ? x[group * ROW + k * DEPTH_STEP] : 0.0f;
        const float second = k < valid ? x[(group + 8) * ROW + k * DEPTH_STEP] : 0.0f;
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            if (t * STEP >= panels) continue;
            const float* line = w + k * WS + t * STEP * 8 + slot * 2;
            const float2 pair = *reinterpret_cast<const float2*>(line);
            sums[t][0] += first * pair.x;
            sums[t][1] += first * pair.y;
            sums[t][2] += second * pair.x;
            sums[t][3] += second * pair.y;
        }
    }
#endif
}

// The sums of `multiply` as numbers of a row-major tile, of which `columns` are there.
template <int NT, int STEP>
__device__ __forceinline__ void put_sums(const float (&sums)[NT][4], float* to, int stride, int columns) {
    const int lane = threadIdx.x % 32, group = lane / 4, slot = lane % 4;
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        const int column = t * STEP * 8 + slot * 2;
#pragma unroll
        for (int q = 0; q < 4; ++q)
            if (column + q % 2 < columns) to[(group + q / 2 * 8) * stride + column + q % 2] = sums[t][q];
    }
}

// Rows k0 ... k0 + K - 1 and columns n0 ... n0 + N - 1 of a matrix (depth, width), with zeros beyond it.
template <int K, int N, int STRIDE, int THREADS>
__device__ __forceinline__ void load_matrix(float* to, const float* from, int depth, int width, int k0, int n0) {
    if (width % 4 == 0 && reinterpret_cast<size_t>(from) % 16 == 0) {
        for (int at = threadIdx.x; at < K * N / 4; at += THREADS) {
            const int k = at / (N / 4), n = at % (N / 4) * 4;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (k0 + k < depth && n0 + n < width)
                value = __ldg(reinterpret_cast<const float4*>(from + (k0 + k) * width + n0 + n));
            *reinterpret_cast<float4*>(to + k * STRIDE + n) = value;
        }
    } else {
        for (int at = threadIdx.x; at < K * N; at += THREADS) {
            const int k = at / N, n = at % N;
            to[k * STRIDE + n] = k0 + k < depth && n0 + n < width ? __ldg(from + (k0 + k) * width + n0 + n) : 0.0f;
        }
    }
}

// to[i] = the sum of `parts` rows of `width` numbers, in order: eight lanes of parts, then these.
__device__ __forceinline__ void sum_parts(float* to, const float* from, int parts, int stride, int width) {
    __shared__ float lines[8][33];
    const int column = threadIdx.x % 32, line = threadIdx.x / 32, i = blockIdx.y * 32 + column;
    float total = 0.0f;
    if (i < width)
        for (int p = line; p < parts; p += 8) total += from[(long long)p * stride + i];
    lines[line][column] = total;
    __syncthreads();
    if (line == 0 && i < width) {
        for (int p = 1; p < 8; ++p) total += lines[p][column];
        to[i] = total;
    }
}

// to[i] = what `parts` rows of `width` numbers have together, by all threads of a block, in an order that never changes.
// `lines`: shared memory for THREADS numbers.
template <class Op, int THREADS>
__device__ __forceinline__ void join_parts(
    float* to, float* lines, const float* from, int parts, int stride, int width, float start) {
    int across = 1;
    while (across < width && across < THREADS) across *= 2;
    for (int first = 0; first < width; first += across) {
        const int i = first + threadIdx.x % across;
        float total = start;
        if (i < width) {
#pragma unroll 4
            for (int p = threadIdx.x / across; p < parts; p += THREADS / across)
                total = Op::of(total, from[(long long)p * stride + i]);
        }
        __syncthreads();
        lines[threadIdx.x] = total;
        __syncthreads();
        for (int step = THREADS / 2; step >= across; step /= 2) {
            if (threadIdx.x < step) lines[threadIdx.x] = Op::of(lines[threadIdx.x], lines[threadIdx.x + step]);
            __syncthreads();
        }
        if (threadIdx.x < across && i < width) to[i] = lines[threadIdx.x];
    }
    __syncthreads();
}
