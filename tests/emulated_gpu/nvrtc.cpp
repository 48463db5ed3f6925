// An emulated libnvrtc.so: compiles CUDA C for the CPU, to a shared library that the emulated driver takes for a cubin.

#include "gpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>

#include <dlfcn.h>

namespace {

struct Program {
  std::string source, log, code;
};

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// For each kernel the function by which the driver calls it.
std::string entries(const std::string& source) {
  static const std::regex kernel(R"(__global__\s+void\s+(?:__launch_bounds__\(\w+\)\s+)?(\w+)\()");
  std::string all;
  for (std::sregex_iterator match(source.begin(), source.end(), kernel), none; match != none; ++match) {
    auto name = (*match)[1].str();
    all += "extern \"C\" void launch_" + name + "(void** parameters) { emulated_call(" + name + ", parameters); }\n";
  }
  return all;
}

bool compile(Program& program) {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&compile), &info);
  auto here = std::filesystem::absolute(info.dli_fname).parent_path().string();
  auto pattern = (std::filesystem::temp_directory_path() / "emulated-nvrtc-XXXXXX").string();
  if (!mkdtemp(pattern.data())) gpu::fail("no folder can be made in %s", pattern.c_str());
  std::filesystem::path folder = pattern;
  std::ofstream(folder / "kernels.cpp") << "#line 1 \"kernels.cu\"\n" << program.source << entries(program.source);
  const char* compiler = getenv("CXX");
  auto command = "{ " + std::string(compiler ? compiler : "c++") + " -std=c++17 -O1 -fPIC -fsanitize=thread -c -include '" +
                 here + "/kernel.h' kernels.cpp && " + (compiler ? compiler : "c++") + " -shared kernels.o -o kernels.so -L'" +
                 here + "' -l:libcuda.so.1; } >log 2>&1";
  bool done = !system(("cd '" + pattern + "' && " + command).c_str());
  program.log = content(folder / "log");
  if (done) program.code = content(folder / "kernels.so");
  std::filesystem::remove_all(folder);
  return done;
}

}  // namespace

// NVRTC's interface, as far as Lockstep calls it. Results are nvrtcResult's numbers.
extern "C" {

enum { SUCCESS = 0, COMPILATION = 6 };

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 99, SUCCESS; }
int nvrtcGetNumSupportedArchs(int* n) { return *n = 1, SUCCESS; }
int nvrtcGetSupportedArchs(int* all) { return *all = 90, SUCCESS; }

int nvrtcCreateProgram(Program** program, const char* source, const char*, int, const char* const*, const char* const*) {
  return *program = new Program{source, {}, {}}, SUCCESS;
}
int nvrtcDestroyProgram(Program** program) { return delete *program, *program = nullptr, SUCCESS; }
int nvrtcCompileProgram(Program* program, int, const char* const*) {
  if (gpu::fault_is_set("no-kernels")) return program->log = "a fault was asked for", COMPILATION;
  return compile(*program) ? SUCCESS : COMPILATION;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) { return *size = program->log.size() + 1, SUCCESS; }
int nvrtcGetProgramLog(Program* program, char* log) { return strcpy(log, program->log.c_str()), SUCCESS; }
int nvrtcGetCUBINSize(Program* program, size_t* size) { return *size = program->code.size(), SUCCESS; }
int nvrtcGetCUBIN(Program* program, char* code) {
  return memcpy(code, program->code.data(), program->code.size()), SUCCESS;
}

}  // extern "C"
