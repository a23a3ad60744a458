// Runs the thread code of csrc/lookup_sm90.h on a CPU: an emulation, not the GPU kernel.
//
// Every thread of a cluster of thread blocks is a thread here, mbarriers are mutexes with counts of arrivals and
// bytes, and one copier per block does the bulk copies late and in random order. What is the same code: tiles,
// indices, entries, sums, and which barrier is waited for before which copy; ThreadSanitizer sees a stage that is
// overwritten while it is read. What is not: the instructions of lookup_sm90.cu and its launches.
//
// lookup_sm90_emulation IN OUT: IN holds problems, each a header of int64 (see main), codes (int64), weights and
// tables; OUT gets each problem's y. lookup_sm90_emulation plan N O BITS VALUE_BYTES MULTIPROCESSORS: the plan.

#include "lookup_sm90.h"

#include <barrier>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

using namespace mf_train;

static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "protocol violated: %s\n", what);
    std::abort();
}

// An mbarrier: a phase ends when all arrivals and all announced bytes are in.
class Mbarrier {
public:
    void init(int count) { count_ = pending_ = count; }
    void arrive(int64_t expected_bytes = 0) {
        std::lock_guard lock(mutex_);
        require(pending_ > 0, "more arrivals than the barrier counts");
        bytes_ += expected_bytes;
        --pending_;
        end_phase_if_complete();
    }
    void complete(int64_t bytes) {
        std::lock_guard lock(mutex_);
        bytes_ -= bytes;
        end_phase_if_complete();
    }
    void wait(int parity) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return phase_ != parity; });
    }

private:
    void end_phase_if_complete() {
        if (pending_ > 0 || bytes_ != 0) return;
        phase_ ^= 1;
        pending_ = count_;
        changed_.notify_all();
    }
    std::mutex mutex_;
    std::condition_variable changed_;
    int count_ = 0, pending_ = 0, phase_ = 0;
    int64_t bytes_ = 0;
};

// Does what it is asked for some time later, in any order, as bulk copies may.
class Copier {
public:
    explicit Copier(unsigned seed) : random_(seed), thread_([this] { run(); }) {}
    ~Copier() {
        { std::lock_guard lock(mutex_); closed_ = true; }
        changed_.notify_all();
        thread_.join();
    }
    void submit(std::function<void()> copy) {
        { std::lock_guard lock(mutex_); copies_.push_back(std::move(copy)); }
        changed_.notify_all();
    }

private:
    void run() {
        for (;;) {
            std::function<void()> copy;
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, [&] { return closed_ || !copies_.empty(); });
                if (copies_.empty()) return;
                std::swap(copies_[random_() % copies_.size()], copies_.back());
                copy = std::move(copies_.back());
                copies_.pop_back();
            }
            for (unsigned i = random_() % 4; i > 0; --i) std::this_thread::yield();
            copy();
        }
    }
    std::mt19937 random_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::function<void()>> copies_;
    bool closed_ = false;
    std::thread thread_;
};

struct Block {
    Block(int bytes, int warps, unsigned seed) : memory(bytes / ALIGNMENT + 1), copier(seed) {
        std::memset(static_cast<void*>(memory.data()), 0xff, bytes);  // NaN in either type
        for (int i = 0; i < warps; ++i) warp_syncs.push_back(std::make_unique<std::barrier<>>(WARP));
    }
    struct alignas(ALIGNMENT) Line { char bytes[ALIGNMENT]; };
    std::vector<Line> memory;
    Mbarrier full[MAX_STAGES], empty[MAX_STAGES];
    std::vector<std::unique_ptr<std::barrier<>>> warp_syncs;
    Copier copier;
};

struct Tables {
    const char* values;
    int64_t rows, columns;  // of all tables
    int value_bytes;
};

struct Emulated {
    using Address = const char*;
    std::vector<std::unique_ptr<Block>>* blocks;
    std::barrier<>* everyone;
    Tables tables;
    int rank, thread_number, row_bytes;

    Block& own() const { return *(*blocks)[rank]; }
    static char* memory(Block& block) { return block.memory[0].bytes; }
    Address address(int offset) const { return memory(own()) + offset; }
    static Words load(Address from) { return *reinterpret_cast<const Words*>(from); }
    static void store(void* to, const Words& words) { std::memcpy(to, &words, sizeof words); }
    int thread() const { return thread_number; }
    int cluster_rank() const { return rank; }
    void cluster_sync() const { everyone->arrive_and_wait(); }
    void init_barriers(int stages, int warps) const {
        for (int i = 0; i < stages; ++i) {
            own().full[i].init(1);
            own().empty[i].init(warps * static_cast<int>(blocks->size()));
        }
    }
    void wait_full(int stage, int parity) const { own().full[stage].wait(parity); }
    void wait_empty(int stage, int parity) const { own().empty[stage].wait(parity); }
    void release(int stage) const {
        own().warp_syncs[thread_number / WARP]->arrive_and_wait();
        const size_t lane = thread_number % WARP;
        if (lane < blocks->size()) (*blocks)[lane]->empty[stage].arrive();
    }
    void expect(int stage, int bytes) const { own().full[stage].arrive(bytes); }
    void copy_slice(int stage, int at, int column, int row, int bytes) const {
        own().copier.submit([=, *this] {
            for (auto& block : *blocks) {
                for (int i = 0; i < bytes / row_bytes; ++i) {
                    require(row + i < tables.rows, "a slice's rows lie within the tables");
                    char* to = memory(*block) + at + i * row_bytes;
                    const int64_t inside = std::min<int64_t>(row_bytes, (tables.columns - column) * tables.value_bytes);
                    std::memset(to, 0, row_bytes);
                    std::memcpy(to, tables.values + ((row + i) * tables.columns + column) * tables.value_bytes, inside);
                }
                block->full[stage].complete(bytes);
            }
        });
    }
    void copy_entries(int stage, int at, const void* from, int bytes) const {
        own().copier.submit([=, *this] {
            std::memcpy(memory(own()) + at, from, bytes);
            own().full[stage].complete(bytes);
        });
    }
};

struct Header {
    int64_t tokens, columns, num_tables, bits, value_bytes, lanes, warps, cluster, stages, seed;
};

template <class Packing>
void pack(const Packing& packing) {
    for (int64_t block_x = 0; block_x * SQUARE < packing.padded_tokens; ++block_x) {
        for (int block_y = 0; block_y * SQUARE < packing.num_tables; ++block_y) {
            typename Packing::Square square;
            for (int i = 0; i < SQUARE * SQUARE_WARPS; ++i) {
                packing.read_square(square, block_x, block_y, i % SQUARE, i / SQUARE);
            }
            for (int i = 0; i < SQUARE * SQUARE_WARPS; ++i) {
                packing.write_square(square, block_x, block_y, i % SQUARE, i / SQUARE);
            }
        }
    }
}

template <class S>
void run(const Header& header, const std::vector<int64_t>& codes, const char* weights, const char* tables, char* y) {
    using Element = typename S::Element;
    const int rows = 1 << header.bits, cluster = static_cast<int>(header.cluster);
    const int64_t padded = padded_tokens(header.tokens);
    std::vector<typename Element::Entry> entries(padded * header.num_tables);
    pack(Packing<Element, int64_t>{codes.data(), reinterpret_cast<const typename Element::Value*>(weights),
                                   entries.data(), header.tokens, padded, static_cast<int>(header.num_tables), rows,
                                   S::ROW_BYTES});
    const Problem problem{header.tokens, padded,         header.columns, static_cast<int>(header.num_tables),
                          rows,          rows / cluster, static_cast<int>(header.stages), entries.data(), y};
    const Tables all{tables, header.num_tables * rows, header.columns, static_cast<int>(header.value_bytes)};
    const int bytes = BARRIER_BYTES + problem.stages * (rows * S::ROW_BYTES + S::TILE_BYTES);
    const int64_t tiles = (header.tokens + S::TILE - 1) / S::TILE;
    for (int64_t block_y = 0; block_y * S::COLUMNS < header.columns; ++block_y) {
        for (int64_t first = 0; first < tiles; first += cluster) {
            std::vector<std::unique_ptr<Block>> blocks;
            for (int rank = 0; rank < cluster; ++rank) {
                blocks.push_back(std::make_unique<Block>(bytes, S::WARPS, static_cast<unsigned>(header.seed + rank)));
            }
            std::barrier<> everyone(static_cast<std::ptrdiff_t>(cluster) * S::THREADS);
            std::vector<std::thread> threads;
            for (int i = 0; i < cluster * S::THREADS; ++i) {
                threads.emplace_back([&, i] {
                    Emulated machine{&blocks, &everyone, all, i / S::THREADS, i % S::THREADS, S::ROW_BYTES};
                    lookup_thread<S>(machine, problem, first + i / S::THREADS, block_y);
                });
            }
            for (auto& thread : threads) thread.join();
        }
    }
}

template <class Element, int LANES>
void choose_warps(const Header& header, const std::vector<int64_t>& codes, const char* weights, const char* tables,
                  char* y) {
    if (header.warps == PLAN_WARPS) return run<Shape<Element, LANES, 16, PLAN_WARPS>>(header, codes, weights, tables, y);
    require(header.warps == 2, "2 or 12 warps are compiled");
    run<Shape<Element, LANES, 4, 2>>(header, codes, weights, tables, y);
}

template <class Element>
void choose_lanes(const Header& header, const std::vector<int64_t>& codes, const char* weights, const char* tables,
                  char* y) {
    return header.lanes == 8 ? choose_warps<Element, 8>(header, codes, weights, tables, y)
                             : choose_warps<Element, 4>(header, codes, weights, tables, y);
}

template <class T>
std::vector<T> read(std::FILE* file, int64_t count) {
    std::vector<T> values(count);
    require(std::fread(values.data(), sizeof(T), count, file) == static_cast<size_t>(count), "IN is complete");
    return values;
}

int main(int argc, char** argv) {
    if (argc == 7 && !std::strcmp(argv[1], "plan")) {
        const int bits = std::atoi(argv[4]), value_bytes = std::atoi(argv[5]);
        const Plan plan = make_plan(std::atoll(argv[2]), std::atoll(argv[3]), bits, value_bytes, std::atoi(argv[6]));
        std::printf("%d %d %d %d %d\n", plan.lanes, plan.passes, plan.cluster, plan.stages,
                    shared_bytes(plan, 1 << bits, value_bytes == 2 ? 4 : 8));
        return 0;
    }
    require(argc == 3, "usage: IN OUT, or plan N O BITS VALUE_BYTES MULTIPROCESSORS");
    std::FILE *in = std::fopen(argv[1], "rb"), *out = std::fopen(argv[2], "wb");
    require(in && out, "IN and OUT can be opened");
    Header header;
    while (std::fread(&header, sizeof header, 1, in) == 1) {
        const int64_t reads = header.tokens * header.num_tables;
        const auto codes = read<int64_t>(in, reads);
        const auto weights = read<char>(in, reads * header.value_bytes);
        const auto tables =
            read<char>(in, (header.num_tables << header.bits) * header.columns * header.value_bytes);
        std::vector<char> y(header.tokens * header.columns * header.value_bytes);
        (header.value_bytes == 2 ? choose_lanes<BFloat16> : choose_lanes<Float32>)(
            header, codes, weights.data(), tables.data(), y.data());
        require(std::fwrite(y.data(), 1, y.size(), out) == y.size(), "OUT can be written");
    }
    std::fclose(in);
    return std::fclose(out);
}
