#include "source_compiler.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern char** environ;

namespace ferrum::metal_compat {

namespace {

std::string compiler_path() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&compile_source), &info)) return "mslc.py";
  return (std::filesystem::absolute(info.dli_fname).parent_path() / "metal_compat" / "mslc.py").string();
}

std::string contents(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The exit status of `python3 arguments...`, whose output goes to `log`; -1 if it did not start.
int run_python(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<char*> argv{const_cast<char*>("python3")};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  pid_t child;
  const int failed = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed) return -1;
  int status;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

void remove_folder(const std::string& folder) {
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
}

Compiled compile_source(const std::string& source) {
  std::string folder = (std::filesystem::temp_directory_path() / "ferrum-metal-XXXXXX").string();
  if (!mkdtemp(folder.data())) return {"", "", "no folder can be made in " + folder};
  const std::string file = folder + "/kernels.metal", library = folder + "/kernels.metallib", log = folder + "/log";
  std::ofstream(file) << source;
  const int status = run_python({compiler_path(), "build", file, "-o", library}, log);
  if (status == 0) return {library, folder, ""};
  std::string error = status < 0 ? "python3, which runs the kernel compiler, does not start" : contents(log);
  remove_folder(folder);
  return {"", "", error.empty() ? "the kernel compiler failed" : error};
}

}  // namespace ferrum::metal_compat
